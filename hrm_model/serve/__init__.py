"""Serving a model over HTTP. scheduler.py knows no HTTP; what needs the extra `serve` is app.py and run.py."""
