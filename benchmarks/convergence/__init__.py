"""Does training end as well? A small residual network on real images, stock against fused, some seeds."""
