"""Reading private data: arrays of images and lines of text. Nothing read here ever leaves the client."""

from share_client.data.content import content_hash
from share_client.data.images import ImageRows, read_images
from share_client.data.text import TextRows, read_text

__all__ = ["ImageRows", "TextRows", "content_hash", "read_images", "read_text"]
