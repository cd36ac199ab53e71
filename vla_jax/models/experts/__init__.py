"""Action experts: modules with `denoise`, which see the backbone only through its cache."""
