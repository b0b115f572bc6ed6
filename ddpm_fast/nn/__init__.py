"""Networks: the U-Net, and what makes networks of other packages fast."""
