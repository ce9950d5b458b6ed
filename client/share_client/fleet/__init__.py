"""The Flower side of a client: forwarder, SuperNode and ClientApp."""
