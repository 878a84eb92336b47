"""The main job: train, fold, quantize, export and verify a text classifier, and show what each rung costs."""
