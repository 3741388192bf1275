"""Parts of upload_to_hub.py."""
