"""Many runs from one config file, and what they show together."""
