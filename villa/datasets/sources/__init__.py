"""Tables, archives, folders and data sets of Hugging Face, read as the records of JSON lines."""
