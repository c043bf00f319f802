"""The shapes that are measured, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

# 1 / 0.07, CLIP's scale at the start of training.
SCALE = 14.3
ROWS = {
    256: "a small batch, where fixed costs decide",
    1_024: "all-MiniLM-L6-v2's batch (sentence-transformers' model card)",
    4_096: "SimCLR's batch (Chen et al., 2020)",
    8_192: "between SimCLR's batch and ALIGN's",
    16_384: "ALIGN's batch (Jia et al., 2021)",
    20_480: "Modest-Align's and FuseMix's batch of latents on one GPU (Vouitsis et al., 2024)",
    32_768: "CLIP's batch (Radford et al., 2021)",
    65_536: "BASIC's batch (Pham et al., 2021)",
}
FEATURES = {
    256: "a small shared space",
    512: "CLIP ViT-B/32",
    768: "CLIP ViT-L/14",
    1_024: "CLIP RN50, OpenCLIP ViT-H/14",
}
NAMES = {
    (1_024, 512): "minilm",
    (4_096, 512): "simclr",
    (16_384, 512): "align",
    (20_480, 512): "fusemix",
    (32_768, 512): "clip-vit-b32",
    (32_768, 768): "clip-vit-l14",
    (32_768, 1_024): "clip-rn50",
    (65_536, 512): "basic",
}
# Each query's own, as BGE is fine-tuned with (a group of eight passages).
HARD_NEGATIVES = 7
OTHER_LOSSES = {
    "supcon": "SupCon of B views: two of each image, two images a class",
    "gte": "GTE's four directions in one softmax",
    "own-negatives": f"InfoNCE of B pairs and {HARD_NEGATIVES} hard negatives of each query's own",
}
# The features of FuseMix's two encoders: DINOv2 ViT-g/14 for images, BGE-large for texts.
LATENT_FEATURES = (1_536, 1_024)


@dataclass(frozen=True)
class Workload:
    """One shape: B = ``rows`` pairs of D = ``features``.

    Attributes:
        kind: "loss" (every provider side by side), "operations" (a backend's five functions), "step" (one training
            step of the reference trainer) or one of OTHER_LOSSES.
        rows: B.
        features: D.
        dtype: of the features.
        peers: which other losses take part: "all", "fast" (none that costs tens of seconds) or "none".
    """

    kind: str
    rows: int
    features: int
    dtype: str
    peers: str = field(default="all", compare=False)

    @property
    def name(self) -> str:
        """The name that ``--workloads`` takes."""
        return NAMES.get((self.rows, self.features), f"{self.rows}x{self.features}")

    @property
    def sides(self) -> tuple[int, int]:
        """The rows of both sides' features."""
        rows = self.rows // 2 if self.kind == "supcon" else self.rows
        return rows, rows * (1 + HARD_NEGATIVES) if self.kind == "own-negatives" else rows

    @property
    def provenance(self) -> str:
        """Where the shape comes from."""
        return f"{ROWS.get(self.rows, 'scaling')}; {FEATURES.get(self.features, f'D = {self.features}')}"

    def __str__(self) -> str:
        return f"{self.kind} {self.rows:,} x {self.features:,} {self.dtype}"


def default_workloads(device: str, full: bool) -> list[Workload]:
    """What a plain run measures on "cpu" or "cuda", most telling first: a time limit cuts the end.

    On a GPU everything is in the plain run; ``full`` only lifts the limit.
    """
    if device == "cuda":
        return _cuda_workloads()
    if not full:
        return [
            *(Workload("loss", rows, 512, "float32") for rows in (1_024, 4_096, 256)),
            Workload("operations", 4_096, 512, "float32"),
            Workload("step", 4_096, 512, "float32"),
            *(Workload("loss", rows, 512, "bfloat16") for rows in (1_024, 4_096)),
            *(Workload(kind, 4_096, 512, "float32") for kind in OTHER_LOSSES),
        ]
    sizes = (256, 1_024, 4_096, 8_192)
    return [
        *(Workload("loss", rows, 512, "float32") for rows in (*sizes, 16_384)),
        *(Workload("loss", rows, features, "float32", "fast") for features in (256, 1_024) for rows in sizes),
        *(Workload("loss", 16_384, features, "float32", "none") for features in (256, 1_024)),
        *(Workload("loss", rows, 512, "bfloat16") for rows in sizes),
        *(Workload("operations", 8_192, 512, dtype) for dtype in ("float32", "bfloat16")),
        Workload("step", 20_480, 512, "float32"),
        *(Workload(kind, rows, 512, "float32") for kind in OTHER_LOSSES for rows in (4_096, 16_384)),
        *(Workload("loss", rows, 512, "float32", "none") for rows in (32_768, 65_536)),
    ]


def _cuda_workloads() -> list[Workload]:
    crowded = {(4_096, 512), (32_768, 512), (32_768, 1_024)}
    grid = [(rows, features) for rows in (32_768, 4_096, 1_024, 16_384, 65_536) for features in (1_024, 512, 768)]
    grid.insert(3, (20_480, 512))
    in_bfloat16, in_float16 = (
        [Workload("loss", *shape, dtype, "all" if shape in crowded else "fast") for shape in grid]
        for dtype in ("bfloat16", "float16")
    )
    return [
        *in_bfloat16,
        *(Workload("operations", 32_768, features, "bfloat16") for features in (512, 1_024)),
        Workload("step", 20_480, 512, "float32"),
        *(Workload("loss", rows, 512, "bfloat16", peers="none") for rows in (131_072, 262_144, 524_288)),
        *in_float16,
        Workload("loss", 1_048_576, 512, "bfloat16", peers="none"),
    ]
