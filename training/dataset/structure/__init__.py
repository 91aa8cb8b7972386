"""What a text says about itself: its imports, definitions, whole nodes and skeleton; and who needs whom."""
