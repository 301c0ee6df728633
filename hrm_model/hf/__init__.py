"""CosmicFish-HRM for Hugging Face's transformers. Importing this registers it with the Auto classes:

    import hrm_model.hf
    model = AutoModelForCausalLM.from_pretrained("models/mine")   # nothing in the folder is executed

Raises ImportError, with the command that installs it, where transformers is missing or too old.
"""

OLDEST = (4, 57)
_HINT = "pip install 'hrm-kernels[hf]' (in a checkout: pip install -e '.[hf]')"

try:
    import transformers
except ImportError as error:
    raise ImportError(f"hrm_model.hf needs the package transformers: {_HINT}") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"hrm_model.hf needs transformers {'.'.join(map(str, OLDEST))} or later, and finds "
        f"{transformers.__version__}: {_HINT}"
    )

from .cache import HRMGenerationCache  # noqa: E402
from .configuration import CosmicFishHRMConfig  # noqa: E402
from .modeling import CosmicFishHRMForCausalLM, CosmicFishHRMOutput  # noqa: E402

__all__ = ["CosmicFishHRMConfig", "CosmicFishHRMForCausalLM", "CosmicFishHRMOutput", "HRMGenerationCache"]

transformers.AutoConfig.register(CosmicFishHRMConfig.model_type, CosmicFishHRMConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(CosmicFishHRMConfig, CosmicFishHRMForCausalLM, exist_ok=True)
# by the names here, and not by what is registered, Trainer knows whose targets label smoothing shifts
transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CosmicFishHRMConfig.model_type] = (
    CosmicFishHRMForCausalLM.__name__
)
transformers.AutoTokenizer.register(
    CosmicFishHRMConfig, fast_tokenizer_class=transformers.PreTrainedTokenizerFast, exist_ok=True
)
