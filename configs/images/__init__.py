"""Configurations of launch.images: each has get_config() -> ImagesConfig."""
