"""A policy as one compiled program: uint8 images and raw state in, actions in the robot's units out."""
