"""Views of images: samplers of the map g, the same g applied to pixels, and color."""
