"""Users, histories and learning: this room knows no scheduler and no pages."""
