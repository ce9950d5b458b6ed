"""Reading private data: tables, texts and images. Nothing read here ever leaves the client."""

from share_client.data.content import content_hash
from share_client.data.images import ImageRows, read_image_splits, read_images
from share_client.data.pictures import IMAGE_OPTIONS, Fit, load_pictures
from share_client.data.splits import held_out, read_splits
from share_client.data.table import Field, Table, read_table

__all__ = [
    "IMAGE_OPTIONS",
    "Field",
    "Fit",
    "ImageRows",
    "Table",
    "content_hash",
    "held_out",
    "load_pictures",
    "read_image_splits",
    "read_images",
    "read_splits",
    "read_table",
]
