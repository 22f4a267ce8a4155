"""Knowledge distillation for object detectors: any method, alone or combined, on any detector."""
