"""Text classification, single texts or pairs."""

from __future__ import annotations

from share_client.backbones import Backbone
from share_client.data import Field, read_splits
from share_client.kinds.classification import Classification, classes_of, indices_of
from share_client.kinds.kind import PreparedTask
from share_client.kinds.texts import TEXTS, text_backbone, text_rows
from share_client.tasks_file import TaskConfig, read_options

FIELDS = (*TEXTS, Field("label", (int, str)))
"""What a row holds: one text or two, and the label."""


class TextClassification(Classification):
    """A label for each text or pair of texts."""

    name = "text-classification"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, pairs in one file only, an option, or a backbone that takes no text.
        """
        takes = text_backbone(config, backbone)
        read_options(config, {})
        train, test = read_splits(config, FIELDS)
        labels = (train.columns["label"], test.columns["label"])
        classes = classes_of(labels, config, test.where)
        return PreparedTask(
            config=config,
            kind=self,
            train=text_rows(train, indices_of(labels[0], classes), takes, config),
            test=text_rows(test, indices_of(labels[1], classes), takes, config),
            classes=classes,
        )
