"""Files that nobody wrote, thrown at the reader: it must refuse them by name or read what safetensors reads."""
