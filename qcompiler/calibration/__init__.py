"""Where the inputs come from that models are run on."""
