using System.Collections.Generic;

namespace Shop.Inventory
{
    public class Stock
    {
        private readonly Dictionary<string, Item> items = new();

        public int Left { get; private set; }

        public void Add(Item item)
        {
            if (items.ContainsKey(item.Name))
            {
                throw new System.ArgumentException(item.Name);
            }
            items[item.Name] = item;
            Left += item.Count;
        }
    }
}
