"""The loss in other people's trainers: a module for each, which needs that trainer, and which nothing here imports."""
