"""The commands, a file for each kind; hylo.cli lists them. What is heavy is imported inside them."""
