"""What the quality table compares. Shares are of the raw bytes, everything that is stored with them included."""

SHARES = ["50%", "25%", "12.5%", "12%", "6.25%", "3.2%"]

EVICTIONS = [
    "random",
    "streaming",
    "knorm",
    "knorm_recent",
    "keydiff",
    "keydiff_recent",
    "h2o",
    "snapkv",
    "snapkv_adaptive",
    "snapkv_pyramid",
    "cake_uniform",
    "cake_uniform_adaptive",
    "cake",
    "cake_tau_1.6_0.4",
    "cake_dispersion",
    "cake_dispersion_adaptive",
    "windowkv",
    "windowkv_groups_of_6",
]

QUERY_FREE = ("random", "streaming", "knorm", "keydiff")

# Codec chains over stored chunks of 256 tokens. PROFILE is learnt on the other text, by kvern.calibrate. minicache as it stands refuses pairs of layers at more than 45 degrees,
# which are all here; max_angle=180 shows what that spares.
CHAINS = [
    "raw",
    "raw | zstd",
    "fp8",
    "int8",
    "int4",
    "int3",
    "int2",
    "unrotate | int8",
    "unrotate | int4",
    "unrotate | int3",
    "unrotate | int2",
    "minicache",
    "minicache(max_angle=180)",
    "minicache | int8",
    "minicache | int4",
    "minicache(max_angle=180) | int4",
    "unrotate | minicache(profile=PROFILE) | int8",
    "unrotate | minicache(profile=PROFILE) | int4",
    "centroid(ratio=0.75)",
    "centroid(ratio=0.5)",
    "centroid(ratio=0.25)",
    "unrotate | centroid(ratio=0.5) | int8",
    "unrotate | centroid(ratio=0.5) | int4",
    "centroid(ratio=0.75) | int8",
    "centroid(ratio=0.5) | int8",
    "centroid(ratio=0.25) | int8",
    "centroid(ratio=0.75) | int4",
    "centroid(ratio=0.5) | int4",
    "centroid(ratio=0.25) | int4",
    "centroid(ratio=0.5) | int3",
    "int8r",
    "int8 | zstd",
    "int4 | zstd",
    "unrotate | int4 | zstd",
    "centroid(ratio=0.75) | int4 | zstd",
    "int2 | zstd",
]

# Survivors of an eviction in a chain; the share is that of the whole.
COMBINATIONS = [
    f"{eviction}({share}) | {chain}"
    for eviction in ("snapkv", "snapkv_adaptive", "cake_dispersion_adaptive", "keydiff_recent", "knorm_recent", "streaming")
    for chain in ("int8", "int4")
    for share in ("25%", "12.5%", "6.25%", "3.2%")
]
