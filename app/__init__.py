"""The desktop app: what the user sees. Gradio and FastAPI live only here."""
