"""Training on several processes: who they are, what each of them works on, and how gradients come together."""
