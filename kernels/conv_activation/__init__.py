"""A depthwise 3×3 convolution with its activation: reference."""
