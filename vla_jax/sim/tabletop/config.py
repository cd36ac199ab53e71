"""Sizes, speeds and probabilities of the tabletop: metres, seconds, origin at the near left corner."""

import dataclasses

from vla_jax.finite import finite

KINDS = ("symmetric", "asymmetric", "clear")
"""How the obstacle lies between gripper and goal; the order of `TabletopConfig.kind_weights`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class TabletopConfig:
    """The table, its things, the robot and its expert. x points right, y away from the robot (up)."""

    table_m: float = 0.64
    """Side of the square table; at 64 pixels one pixel of the top view is one centimetre."""
    image_size: int = 64
    """Height and width of both cameras, in pixels."""
    wrist_window_m: float = 0.24
    """Side of the square around the gripper that the wrist camera sees."""
    dt_s: float = 0.1
    """Control period."""
    max_steps: int = 60
    """Control steps after which an episode ends as a failure."""
    max_speed_m_per_s: float = 0.25
    """The world shortens faster velocity commands to this."""

    gripper_radius_m: float = 0.02
    """Radius of the gripper disc, the only part that can collide."""
    gripper_rate: float = 0.4
    """Change of the opening (1 open, 0 closed) per step; 0.4 closes in three steps."""
    grasp_radius_m: float = 0.05
    """A gripper that becomes closed this near to an object's centre has reached it."""

    start_x_m: tuple[float, float] = (0.24, 0.40)
    """Range of the gripper's first x."""
    start_y_m: tuple[float, float] = (0.06, 0.10)
    """Range of the gripper's first y."""
    object_x_m: tuple[float, float] = (0.09, 0.55)
    """Range of the objects' centres in x."""
    object_y_m: tuple[float, float] = (0.52, 0.57)
    """Range of the objects' centres in y."""
    object_gap_m: float = 0.14
    """Least distance in x between two objects' centres."""
    alike_fraction: float = 0.0
    """Share of scenes in which objects may have one colour, so that a policy must tell shapes apart as well."""
    obstacle_y_m: tuple[float, float] = (0.28, 0.33)
    """Range of the obstacle's centre in y."""
    obstacle_radius_m: tuple[float, float] = (0.075, 0.09)
    """Range of the radius of the obstacle, a disc."""
    kind_weights: tuple[float, float, float] = (0.4, 0.4, 0.2)
    """Probabilities of symmetric, asymmetric and clear scenes."""
    asymmetric_shift_m: tuple[float, float] = (0.03, 0.06)
    """Range of the distance between obstacle centre and straight line in asymmetric scenes."""
    clear_gap_m: tuple[float, float] = (0.015, 0.05)
    """Range of what the straight line keeps in clear scenes, beyond the expert's own margin."""

    margin_m: float = 0.03
    """Clearance between gripper and obstacle that the expert plans with."""
    side_tolerance_m: float = 0.01
    """Ways round the obstacle that differ by less are equally short: the expert tosses a coin."""
    approach_rate_per_s: float = 5.0
    """The expert's speed near the goal is this times the distance that is left."""
    close_radius_m: float = 0.025
    """The expert starts to close this near to the goal."""
    hold_radius_m: float = 0.04
    """The expert goes on closing this near to the goal."""

    swapped_fraction: float = 0.65
    """Share of demonstrations that ask for another object than the one behind the obstacle. Without them the
    obstacle's place would tell which object is meant, and a policy could do without reading."""
    scattered_fraction: float = 0.4
    """Share of demonstrations that start anywhere on the table. Without them the gripper's place would tell where
    it is going, and a policy that has once gone astray would not come back."""
    noisy_fraction: float = 0.5
    """Share of demonstrations that are disturbed (labels stay the expert's own actions)."""
    burst_steps: int = 3
    """Length of a disturbance."""
    burst_probability: float = 0.3
    """Probability that a stretch of `burst_steps` is disturbed, in a disturbed demonstration."""
    burst_std_m_per_s: float = 0.12
    """Standard deviation of the disturbance of each velocity component."""
    burst_clearance_m: float = 0.005
    """A disturbance that would bring the gripper nearer to the obstacle is dropped."""

    def __post_init__(self) -> None:
        """Refuses tables on which the scenes cannot be laid out."""
        if len(self.kind_weights) != len(KINDS) or min(self.kind_weights) < 0 or sum(self.kind_weights) <= 0:
            raise ValueError(
                f"kind_weights {self.kind_weights} must be {len(KINDS)} non-negative numbers with a positive sum"
            )
        for name in ("start_x_m", "start_y_m", "object_x_m", "object_y_m", "obstacle_y_m"):
            low, high = getattr(self, name)
            if not 0 < low <= high < self.table_m:
                raise ValueError(
                    f"{name} {(low, high)} is not a range on the table; use 0 < low <= high < {self.table_m}"
                )
        width = self.object_x_m[1] - self.object_x_m[0]
        if width < 2 * self.object_gap_m:
            raise ValueError(
                f"object_x_m {self.object_x_m} has no room for 3 objects {self.object_gap_m} m apart; "
                f"use object_gap_m <= {width / 2:.3f}"
            )
        if self.start_y_m[1] + self.detour_radius_m(self.obstacle_radius_m[1]) >= self.obstacle_y_m[0]:
            raise ValueError(
                f"start_y_m {self.start_y_m} reaches into the detour round the obstacle; "
                "lower it, or raise obstacle_y_m"
            )
        if self.obstacle_y_m[1] + self.detour_radius_m(self.obstacle_radius_m[1]) >= self.object_y_m[0]:
            raise ValueError(
                f"obstacle_y_m {self.obstacle_y_m} brings the detour to the objects; lower it, or raise object_y_m"
            )
        if not self.close_radius_m <= self.hold_radius_m <= self.grasp_radius_m:
            raise ValueError("close_radius_m <= hold_radius_m <= grasp_radius_m does not hold; order them so")
        if not 0 < self.gripper_rate <= 1:
            raise ValueError(
                f"gripper_rate {self.gripper_rate} is not in (0, 1]; the opening runs from 1 to 0"
            )
        if self.max_steps < 1 or self.image_size < 1 or self.burst_steps < 1:
            raise ValueError("max_steps, image_size and burst_steps must be at least 1")
        for name in (
            "alike_fraction",
            "swapped_fraction",
            "scattered_fraction",
            "noisy_fraction",
            "burst_probability",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is a probability; use a value in [0, 1]")

    def detour_radius_m(self, obstacle_radius_m):
        """Least distance between gripper centre and obstacle centre that the expert plans with."""
        return obstacle_radius_m + self.gripper_radius_m + self.margin_m
