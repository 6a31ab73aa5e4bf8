"""What a method is composed of: each piece is a frozen dataclass behind a small protocol."""
