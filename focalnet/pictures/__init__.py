"""Pictures of models and measurements, drawn with matplotlib in one style."""
