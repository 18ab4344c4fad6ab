"""Results sent to where people already look; each export is a module, and an extra or an environment of its own."""
