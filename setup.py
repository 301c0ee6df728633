"""Kept for tools that look for it; everything is in pyproject.toml. Nothing is compiled, torch is not needed."""

from setuptools import setup

setup()
