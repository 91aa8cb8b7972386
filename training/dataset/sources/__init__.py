"""From what a user names to text: checkout, files, filters, languages, secrets, history."""
