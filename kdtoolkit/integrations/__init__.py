"""Distillation inside trainers of other libraries. Each module here is imported only by users of its library."""
