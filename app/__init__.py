"""The desktop app: what the user sees. Gradio and FastAPI live only here."""

__version__ = "0.1.0"  # the same as in pyproject.toml; a test compares them
