"""What the user sees: tables, progress, questions. Imports records and Rich, and nothing that computes."""
