"""The OpenAI interface over HTTP: what is asked, answers and streams of them, who may ask, and bounds."""
