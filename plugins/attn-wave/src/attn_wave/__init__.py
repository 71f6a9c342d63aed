"""The backend `wave`: attention for AMD Instinct, written in Wave."""
