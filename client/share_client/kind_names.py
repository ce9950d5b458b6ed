"""The task kinds by name: reading a tasks file needs the names alone, and the code of a kind is imported when used."""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, str] = {
    "image-classification": "share_client.kinds.image_classification:ImageClassification",
    "text-classification": "share_client.kinds.text_classification:TextClassification",
    "keypoints": "share_client.kinds.keypoints:Keypoints",
    "pose": "share_client.kinds.pose:Pose",
    "text-to-image": "share_client.kinds.text_to_image:TextToImage",
}
"""Where the class of each kind is, which takes no arguments."""
