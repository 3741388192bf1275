"""The curriculum in other projects' trainers. A module here imports its host only when it is used with it."""
