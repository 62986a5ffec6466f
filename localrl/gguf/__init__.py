"""GGUF, the file format of llama.cpp, Ollama and LM Studio: read, checked and converted."""
