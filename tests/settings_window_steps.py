"""What tests do with the settings window, in a process of its own: Xlib ends a process whose display goes away.

python tests/settings_window_steps.py settings TEXT | cancelled
"""

from __future__ import annotations

import sys
import tkinter
from pathlib import Path
from tkinter import filedialog

sys.path.insert(0, str(Path(__file__).parents[1]))

from hrm_model.continual import settings_window
from hrm_model.continual.options import ContinualConfig
from train.continual import main


def settings(text: str) -> None:
    """Wrong values are said in the window, right ones become flags."""
    root = tkinter.Tk()
    window = settings_window.SettingsWindow(root, {"models": "m"})
    assert window.values["epochs"].get() == "3" and window.values["batch_size"].get() == "16"
    window.start.invoke()
    assert "no text is chosen" in window.message.get() and window.result is None
    filedialog.askopenfilename = lambda **options: text
    window.browse.invoke()
    assert window.text.get() == text
    window.values["epochs"].set("many")
    window.start.invoke()
    assert "Epochs 'many' is not a number" in window.message.get()
    window.values["epochs"].set("1.5")
    window.values["batch_size"].set("0")
    window.start.invoke()
    assert "--batch-size 0 is below" in window.message.get()
    window.values["batch_size"].set("8")
    window.tiny.set(True)
    root.update()
    window.start.invoke()
    assert window.result["epochs"] == 1.5 and window.result["batch_size"] == 8 and window.result["models"] == "m"
    assert ContinualConfig.of_recipe(**window.result).steps == 0
    window = settings_window.SettingsWindow(tkinter.Tk(), {"text": text, "steps": 100})
    window.start.invoke()
    assert window.result is not None, window.message.get()
    assert ContinualConfig.of_recipe(**window.result).steps == 100


def cancelled() -> None:
    """The command ends without having done anything."""

    class Cancelled(settings_window.SettingsWindow):
        def __init__(self, root, given):
            super().__init__(root, given)
            root.after(50, self.cancel.invoke)

    settings_window.SettingsWindow = Cancelled
    assert main(["--gui"]) == 0


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("as expected")
