"""A small window for those who like one: the text, and the settings of training. tkinter, which comes with Python."""

from __future__ import annotations

from typing import Any

from .options import ContinualConfig

FIELDS = (
    ("epochs", "Epochs", float),
    ("batch_size", "Batch size", int),
    ("save_epochs", "Save every N epochs", float),
    ("eval_epochs", "Evaluate every N epochs", float),
)


class SettingsWindow:
    """Args:
    root: a tkinter.Tk. given: flags that were given, which the window shows instead of the defaults.
    """

    def __init__(self, root, given: dict[str, Any]):
        import tkinter

        self.root, self.given, self.result = root, dict(given), None
        root.title("Learn a text")
        self.text = tkinter.StringVar(root, given.get("text", ""))
        self.values = {}
        self.message = tkinter.StringVar(root)
        tkinter.Label(root, text="Text").grid(row=0, column=0, sticky="w", padx=6, pady=3)
        self.path = tkinter.Entry(root, textvariable=self.text, width=40)
        self.path.grid(row=0, column=1, padx=6)
        self.browse = tkinter.Button(root, text="Choose ...", command=self.choose)
        self.browse.grid(row=0, column=2, padx=6)
        defaults = ContinualConfig.of_recipe("base")
        shown = {name: getattr(defaults, name) for name, _, _ in FIELDS} | given
        if "steps" in given and "epochs" not in given:
            shown["epochs"] = 0.0  # --steps says how long the run is
        for row, (name, label, _) in enumerate(FIELDS, 1):
            self.values[name] = tkinter.StringVar(root, f"{shown[name]:g}")
            tkinter.Label(root, text=label).grid(row=row, column=0, sticky="w", padx=6, pady=3)
            tkinter.Entry(root, textvariable=self.values[name], width=8).grid(row=row, column=1, sticky="w", padx=6)
        self.fresh = tkinter.BooleanVar(root, given.get("fresh", False))
        self.tiny = tkinter.BooleanVar(root, given.get("recipe") == "tiny")
        tkinter.Checkbutton(root, text="a new model", variable=self.fresh).grid(row=5, column=0, sticky="w", padx=6)
        tkinter.Checkbutton(root, text="tiny (minutes)", variable=self.tiny).grid(row=5, column=1, sticky="w")
        tkinter.Label(root, textvariable=self.message, fg="red", wraplength=420, justify="left").grid(
            row=6, column=0, columnspan=3, padx=6
        )
        self.start = tkinter.Button(root, text="Start training", command=self.accept)
        self.start.grid(row=7, column=1, pady=6)
        self.cancel = tkinter.Button(root, text="Cancel", command=root.destroy)
        self.cancel.grid(row=7, column=2, pady=6)

    def choose(self) -> None:
        """Ask for a file."""
        from tkinter import filedialog

        path = filedialog.askopenfilename(parent=self.root, filetypes=[("Text", "*.txt"), ("All files", "*")])
        if path:
            self.text.set(path)

    def accept(self) -> None:
        """Take the settings and close; a wrong one is said in the window, which stays."""
        from .text import check_length, read

        chosen = dict(self.given) | {"text": self.text.get().strip(), "fresh": bool(self.fresh.get())}
        chosen["recipe"] = "tiny" if self.tiny.get() else "base"
        try:
            for name, label, kind in FIELDS:
                try:
                    chosen[name] = kind(self.values[name].get())
                except ValueError:
                    what = "a whole number" if kind is int else "a number"
                    raise ValueError(f"{label} {self.values[name].get()!r:.40} is not {what}") from None
            if not chosen["text"]:
                raise ValueError("no text is chosen")
            options = ContinualConfig.of_recipe(**chosen)
            check_length(read(options.text), options.seq_length)
        except (ValueError, OSError) as error:
            self.message.set(str(error))
            return
        self.result = chosen
        self.root.destroy()


def ask(given: dict[str, Any]) -> dict[str, Any] | None:
    """Show the window; the flags that it leaves, None where it was cancelled.

    Raises:
        ValueError: there is no tkinter, or no display.
    """
    try:
        import tkinter
    except ImportError as error:
        raise ValueError(
            f"--gui needs tkinter ({error}); on Debian apt install python3-tk; or give --text FILE"
        ) from error
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        raise ValueError(f"--gui needs a display ({error}); give --text FILE instead") from error
    window = SettingsWindow(root, given)
    root.mainloop()
    return window.result
