using System;
using Shop.Inventory;

namespace Shop
{
    public static class Program
    {
        public static void Main(string[] args)
        {
            var stock = new Stock();
            foreach (var name in args)
            {
                stock.Add(new Item(name, 1));
            }
            Console.WriteLine(stock.Left);
        }
    }
}
