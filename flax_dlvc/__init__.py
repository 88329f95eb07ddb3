"""CNN, ResNet18 and ViT on CIFAR-10 with JAX and Flax: config → data → augment → models → steps → loop → report."""
