"""The λ laboratory: many models in one program, what became of each, and what that says about λ."""
