"""The HTTP server: the OpenAI-compatible API and the page of runs and models.

`app` builds and runs it, `security` admits requests, `openai_api` answers programs, and `dashboard`
answers the page. `model_pool` loads models, and `async_engine` runs each in its own thread.
"""
