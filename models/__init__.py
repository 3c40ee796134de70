"""The networks: one decoder for Qwen2.5 and Llama 3, its attention, and its way in and out of Hugging Face folders."""
