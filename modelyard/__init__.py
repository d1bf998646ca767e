"""Modelyard trains Llama- and Qwen-class language models end to end, from one YAML file."""

__version__ = "0.1.0"
