"""The model card: README.md of an exported folder. It says what is known of the model and nothing else."""

from __future__ import annotations

from ..config import HRMConfig

_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- cosmicfish_hrm
- hierarchical-reasoning
- adaptive-computation
---
"""


def model_card(name: str, config: HRMConfig, parameters: int, dtype: str, with_code: bool) -> str:
    """The text.

    Args:
        name: what the folder is called. parameters: the tied pair counted once. dtype: of the file. with_code: whether
            the folder carries the model's source.
    """
    c = config
    head = f"trained to decide (objective `{c.halting}`)" if c.head_is_trained else "not trained to decide"
    load = f"""```python
import hrm_model.hf  # pip install "hrm-kernels[hf]"; registers the model, nothing in this folder is executed
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
print(pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", max_new_tokens=20))
```"""
    code = ""
    if with_code:
        code = """
Without that package, `trust_remote_code=True` runs the source that this folder carries (it needs torch, transformers
and einops): the same numbers, on plain PyTorch. Pass it to AutoTokenizer too.
"""
    return f"""{_HEADER}
# {name}

A CosmicFish-HRM language model: transformer blocks, a reasoning core of two recurrent levels that each row runs for as
many steps as it needs, transformer blocks again.

{load}
{code}
`model.generate` takes `max_steps`, `force_steps` and `halt_bias` beside its own options.

| | |
|---|---|
| parameters | {parameters:,}, stored as {dtype} |
| window | {c.block_size} tokens, GPT-2's byte-level BPE, vocabulary {c.vocab_size:,} |
| width, heads | {c.n_embd}, {c.n_head} query and {c.kv_heads} key/value heads |
| blocks | {c.n_input_layers} first, {c.hrm_H_layers} H and {c.hrm_L_layers} L in the core, {c.n_output_layers} last |
| a step | {c.hrm_H_cycles} x ({c.hrm_L_cycles} x L, H), {c.blocks_per_step} block applications |
| steps | 1 to {c.hrm_max_steps}, decided per row by a head that was {head}; halting bias {c.halt_bias} |

What it was trained on, how well it does and under which licence it may be used: to be said by whoever publishes it.
"""
