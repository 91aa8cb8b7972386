namespace Shop.Inventory;

public record Item(string Name, int Count);
