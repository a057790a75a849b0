"""What `trl demo` runs on: a corpus of film reviews, a small model and its tokenizer, and samples."""
