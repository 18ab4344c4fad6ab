"""What is written down: frozen records without behaviour, parsed at the border."""
