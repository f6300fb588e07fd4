"""An OpenAI-compatible server over the live engine. Needs FastAPI and uvicorn: the extra `fastalign[serve]`."""
